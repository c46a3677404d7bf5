"""`emoloop bank build` and `emoloop bank show`. Only typer loads before a verb runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..domain import read_target
from . import options as opt

app = typer.Typer(help="Visual prompts: what each emotion looks like.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="The bank's file, such as bank.safetensors.")],
    source: Annotated[
        Path | None,
        typer.Argument(
            help="CSV, JSONL or Parquet, or a folder with one; without it, the log's best pictures."
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="generator, clip, each with =MODEL.")] = "generator",
    visual: Annotated[str, typer.Option(help="lvlm, dinov2, each with =MODEL.")] = "lvlm",
    cells: Annotated[
        int,
        typer.Option(min=0, help="Rows and columns of the valence-arousal plane; 0: the eight categories."),
    ] = 0,
    length: Annotated[int, typer.Option(min=1, help="Entries of an emotion at most.")] = 16,
    held_out: Annotated[float, typer.Option(min=0, max=0.9, help="Share of texts to test with.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the clustering.")] = 0,
    where: opt.Where = None,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
) -> None:
    """Make a bank of an image-text set, or of the log's own best pictures."""
    from rich.console import Console

    from ..settings import load_settings
    from ..tools.bank import bank, encoders, sources
    from ..traces.store import open_store

    if source is not None:
        items = list(sources.table(source))
    else:
        with open_store(load_settings({"home": home}), read_only=True) as store:
            items = list(sources.traced(store, opt.read_where(where)))
    texts, pictures = encoders.text_encoder(text), encoders.visual_encoder(visual)
    with opt.bars(Console(stderr=True), opt.COUNT) as progress:
        task = progress.add_task("bank build", total=len(items))
        made = bank.build(
            items, texts, pictures, cells=cells, length=length, held_out=held_out, seed=seed,
            watch=lambda done: progress.update(task, completed=done),
        )  # fmt: skip
    made.save(out)
    opt.tell(_about(made, out), as_json, lambda: _summary(made, out))


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A bank.")],
    prompt: Annotated[str, typer.Argument(help="What to look up; without it, all entries.")] = "",
    valence: opt.Valence = None,
    arousal: opt.Arousal = None,
    category: opt.Category = None,
    k: Annotated[int, typer.Option(min=1, help="Entries to retrieve.")] = 4,
    text: Annotated[
        str | None, typer.Option(help="What encodes the prompt.  [default: the bank's own]")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of all entries.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Print what a prompt and an emotion retrieve, and write a page to look through."""
    from ..tools.bank.bank import Bank
    from ..tools.bank.sheet import save_sheet

    bank = Bank.load(file)
    wanted = {"valence": valence, "arousal": arousal, "category": category}
    target = read_target(wanted) if any(value is not None for value in wanted.values()) else None
    query, found = None, []
    if prompt:
        from ..tools.bank.encoders import text_encoder

        query = text_encoder(text or bank.head.text_encoder).texts([prompt])[0]
        found = [
            {
                "entry": entry,
                "emotion": bank.head.emotions[bank.emotion[entry]],
                "caption": bank.head.captions[entry],
                "cosine": round(cosine, 4),
            }
            for entry, cosine in bank.retrieve(query, target, k)
        ]
    if html is not None:
        save_sheet(bank, html, prompt, query, k)

    def tell() -> None:
        _summary(bank, file)
        for it in found:
            print(f"  {it['cosine']:.2f}  {it['emotion']:12}  {it['caption']}")
        if html is not None:
            print(f"page: {html}")

    opt.tell({**_about(bank, file), "retrieved": found}, as_json, tell)


def _about(bank: Any, file: Path) -> dict[str, Any]:
    counts = {name: int((bank.emotion == i).sum()) for i, name in enumerate(bank.head.emotions)}
    head = bank.head.model_dump(mode="json", exclude={"captions", "points", "emotions"})
    return {"file": str(file), "sha256": bank.sha256, **head, "entries": counts}


def _summary(bank: Any, file: Path) -> None:
    head = bank.head
    print(f"{file}: {len(bank.emotion)} entries of {head.items} pictures, {bank.sha256[:12]}")
    print(
        f"texts by {head.text_encoder}, pictures by {head.visual_encoder}; {head.skipped} without an emotion"
    )
    if head.agreement is not None:
        print(
            f"{head.agreement:.0%} of {head.tested} held-out texts find an entry of their own emotion first "
            f"(naming the commonest: {head.chance:.0%})"
        )
    for index, name in enumerate(head.emotions):
        mine = bank.emotion == index
        print(f"  {name:12} {int(mine.sum()):4} entries of {int(bank.count[mine].sum()):6} pictures")
