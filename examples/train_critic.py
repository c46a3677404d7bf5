"""What the critic said, as a data set that TRL's SFT trainer takes as it is: two steps on the embedded LVLM."""

from pathlib import Path

from datasets import load_dataset
from emoloop import EmotionTarget, open_log, open_loop
from emoloop.tools.presets import resolve
from emoloop.traces.exchange.export import load_format
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

if __name__ == "__main__":
    with open_loop(home="log", loop={"rounds": 1, "images": 4}) as loop:
        loop.run_sync("a dog by the sea", EmotionTarget(valence=2), seed=1)

    # The same on the command line: `emoloop traces export critic-messages --home log --out chats`
    write, _ = load_format("critic-messages")
    with open_log("log") as log:
        print(write(log, None, Path("chats")), "chats")

    rows = load_dataset("parquet", data_files="chats/data/*.parquet", cache_dir="cache")["train"]
    model = str(resolve("miniature", "lvlm"))
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model),
        args=SFTConfig("out", max_steps=2, per_device_train_batch_size=2, max_length=None, use_cpu=True,
                       bf16=False, report_to=[], save_strategy="no"),
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(model),
    )  # fmt: skip
    print(trainer.train())
