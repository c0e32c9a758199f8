"""Who does what among the processes of a run."""

import pytest

from gnome.errors import InvalidInput
from gnome.models.ranks import Ranks


def test_shares_are_all_the_work_and_overlap_nowhere() -> None:
    shares = [Ranks(rank, 3).share(10) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_alone_and_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = Ranks.from_environment()
    assert alone == Ranks(0, 1, 0)
    assert alone.share(3) == [0, 1, 2]
    alone.wait()


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("RANK", "2"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1")])
def test_an_environment_that_torchrun_did_not_set_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for other, usual in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(other, usual)
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=name):
        Ranks.from_environment()
