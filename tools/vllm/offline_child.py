"""Runs inside vLLM's interpreter: chat requests as JSON lines on stdin, answers as JSON lines on stdout.

    python vllm_offline_child.py '{"model": …, …}'        keyword arguments of vllm.LLM

Whatever has arrived goes into the engine as one call, so a caller that keeps many requests waiting gets full
batches. The standard library and vLLM only: emoloop isn't installed here.
"""

import json
import os
import queue
import sys
import threading

#: Conversations in one call: enough to fill the engine's batches, few enough that nobody waits for long.
AT_ONCE = 256


def entry(logprob, token_id):
    """One token in OpenAI's layout."""
    text = logprob.decoded_token or ""
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob.logprob, "id": token_id}


def answer(request, output):
    """A vLLM output as an answer line."""
    best = output.outputs[0]
    line = {
        "id": request["id"],
        "text": best.text,
        "finish_reason": best.finish_reason or "stop",
        "prompt_tokens": len(output.prompt_token_ids),
        "answer_tokens": len(best.token_ids),
        "cached_tokens": output.num_cached_tokens,
    }
    if best.logprobs is not None:
        line["logprobs"] = [
            {
                **entry(found[token], token),
                "top_logprobs": [
                    entry(value, other)
                    for other, value in sorted(found.items(), key=lambda item: -item[1].logprob)
                ][: request["logprobs"]],
            }
            for token, found in zip(best.token_ids, best.logprobs, strict=True)
        ]
    return line


def main():
    """Load the model, say so, and serve until stdin ends."""
    out = os.fdopen(os.dup(1), "w")  # the answers' own; whatever vLLM prints goes to stderr
    os.dup2(2, 1)

    def say(line):
        out.write(json.dumps(line) + "\n")
        out.flush()

    arrived = queue.SimpleQueue()

    def read():
        for line in sys.stdin:
            arrived.put(json.loads(line))
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()

    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    engine = LLM(**json.loads(sys.argv[1]))

    def sampling(request):
        structured = request["structured"]
        return SamplingParams(
            temperature=request["temperature"],
            seed=request["seed"],
            max_tokens=request["max_tokens"],
            logprobs=request["logprobs"],
            structured_outputs=StructuredOutputsParams(**structured) if structured else None,
        )

    def serve(requests):
        try:
            outputs = engine.chat(
                [request["messages"] for request in requests],
                [sampling(request) for request in requests],
                use_tqdm=False,
                add_generation_prompt=not requests[0]["continues"],
                continue_final_message=requests[0]["continues"],
            )
        except Exception as error:
            if len(requests) == 1:
                say({"id": requests[0]["id"], "error": f"{type(error).__name__}: {error}"})
            else:  # one bad request must not take its company with it
                for request in requests:
                    serve([request])
            return
        for request, output in zip(requests, outputs, strict=True):
            say(answer(request, output))

    say({"ready": True})
    while (first := arrived.get()) is not None:
        waiting = [first]
        while len(waiting) < AT_ONCE and not arrived.empty():
            if (request := arrived.get()) is None:
                arrived.put(None)
                break
            waiting.append(request)
        for kind in (False, True):
            if requests := [request for request in waiting if request["continues"] is kind]:
                serve(requests)


if __name__ == "__main__":
    main()
