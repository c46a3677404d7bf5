"""The contact sheet: everything of a run finds its place, whatever is missing or long."""

from pathlib import Path

import pytest
from emoloop.domain import Candidate, Critique, EmotionTarget, Missing, Round, RunResult, RunStatus
from emoloop.tools.images.sheet import draw_sheet, save_sheet
from PIL import Image


@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_run_is_drawn_whatever_is_missing_or_long(count: int, tmp_path: Path):
    Image.new("RGB", (64, 32), "#ff0000").save(tmp_path / "0.png")
    read = Critique(valence=1, arousal=0, category="awe", alignment=0.5)  # pyright: ignore[reportArgumentType]
    candidates = [
        Candidate(
            round=0, index=index, prompt="a dog", seed=index, sha256=f"{index}" * 64,
            path=tmp_path / f"{index}.png", critique=read if index else Missing(reason="no word " * 40), reward=0.5,
        )
        for index in range(count)
    ]  # fmt: skip
    result = RunResult(
        run_id="r", status=RunStatus.RUNNING, stop_reason=None, prompt="漢字" * 300, target=EmotionTarget(valence=2),
        best=candidates[0] if candidates else None, rounds=[Round(prompt="a dog", candidates=candidates)],
        warnings=["x" * 500],
    )  # fmt: skip
    sheet = draw_sheet(result)
    assert sheet.width == 64 + min(max(count, 3), 8) * 216 - 16
    pixels = {colour: number for number, colour in sheet.getcolors(2**20) or []}
    assert (pixels.get((255, 0, 0), 0) > 10_000) == (count > 0)
    # Pictures that are gone.
    assert pixels.get((238, 238, 238), 0) // 40_000 == max(count - 1, 0)
    with Image.open(save_sheet(result, tmp_path / "sheet.png")) as saved:
        assert saved.size == sheet.size
