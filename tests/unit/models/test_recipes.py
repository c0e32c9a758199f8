"""Settings changed by words, as benchmarks and the training of what ships are told."""

import pytest

from gnome.errors import InvalidInput
from gnome.models.angular_network import AngularSettings
from gnome.models.recipes import varied
from gnome.models.training import TrainSettings


def test_words_change_the_setting_they_name() -> None:
    network, train = varied(AngularSettings(), TrainSettings(), ["width=64", "epochs=3", "precision='bf16'"])
    assert network == AngularSettings(width=64)
    assert train == TrainSettings(epochs=3, precision="bf16")


@pytest.mark.parametrize(
    ("word", "complaint"), [("colour=1", "changes no setting"), ("width=wide", "no number"), ("width", "no number")]
)
def test_other_words_are_refused(word: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        varied(AngularSettings(), TrainSettings(), [word])
