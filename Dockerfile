# syntax=docker/dockerfile:1
# CPU by default; `--build-arg TORCH=cu128` takes torch with CUDA 12.8 from the index of that name.
FROM python:3.12-slim

ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 1000 emoloop && install -d -o emoloop /work /home/emoloop/.cache /home/emoloop/.cache/huggingface
# torch first and alone, so that its layer stays while the code changes.
RUN --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    pip install -c /tmp/constraints.txt --index-url "https://download.pytorch.org/whl/${TORCH}" \
    --extra-index-url https://pypi.org/simple torch
COPY . /src
RUN pip install -c /src/constraints.txt "/src[postgres]" && rm -rf /src

USER emoloop
WORKDIR /work
VOLUME /work
ENTRYPOINT ["emoloop"]
CMD ["--help"]
