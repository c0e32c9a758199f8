"""The example of docs/fp8.md runs as it stands."""

import re
from pathlib import Path

import torch

DOCUMENT = Path(__file__).parents[3] / "docs" / "fp8.md"


def test_the_example_runs_and_prints_what_it_says(capsys: object) -> None:
    torch.manual_seed(0)
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(DOCUMENT), "exec"), names)
    printed = capsys.readouterr().out  # type: ignore[attr-defined]
    assert "2 linear layers in FP8, 0 as they were" in printed
    assert "5.1" in printed
    assert "| 0 | input | e4m3 |" in printed
    assert "20 steps, 0 skipped" in printed
    model = names["model"]
    assert isinstance(model, torch.nn.Sequential)
    assert type(model[0]) is torch.nn.Linear
    assert model[0].weight.dtype == torch.float32
