# syntax=docker/dockerfile:1.7
# fathom for TPU v6e: the last release of PyTorch/XLA with the CPU build of torch. Build from the repository:
#   docker build -f infra/docker/tpu.Dockerfile --build-arg TORCH_INDEX=<the index of torch's CPU builds> -t fathom:tpu .
# State: its pins are infra/tpu's, checked by a test; the image has not been built or run by the project.
FROM python:3.11-slim-bookworm

# Without an index of CPU builds the wheel of PyPI is used, with stubs in place of CUDA: gcc and readelf make them.
ARG TORCH_INDEX=
RUN apt-get update \
    && apt-get install -y --no-install-recommends binutils ca-certificates gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/fathom
COPY libs libs
COPY apps apps
COPY infra infra
COPY pyproject.toml README.md LICENSE ./
RUN PYTHON=python3.11 TORCH_INDEX="$TORCH_INDEX" infra/tpu/setup.sh .venv-tpu
ENV PATH=/opt/fathom/.venv-tpu/bin:$PATH

# Nobody writes into the image: runs and data are mounted (see infra/launch/tpu).
ENTRYPOINT []
CMD ["fathom", "--help"]
