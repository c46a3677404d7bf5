"""One run of the loop with the models that ship with the package, from plain Python."""

from emoloop import EmotionTarget, open_loop

if __name__ == "__main__":
    with open_loop(loop={"rounds": 2, "images": 4}) as loop:
        result = loop.run_sync("a dog by the sea", EmotionTarget(valence=2, arousal=-1), seed=7)

    assert result.best is not None, result.warnings
    for number, round in enumerate(result.rounds):
        best = max(round.candidates, key=lambda it: it.reward or 0.0)
        print(f"round {number}: mean reward {round.mean_reward:.2f}, best {best.reward:.2f}  {best.prompt}")
    print(f"best reward {result.best.reward:.2f}, gain {result.gain:+.2f}, run {result.run_id}")
    result.best.image.save("best.png")
