# syntax=docker/dockerfile:1
# internvl with all that training, evaluation and serving take, for NVIDIA GPUs and for CPUs:
#
#     docker build -t internvl .
#
# docs/en/deployment.md says how to train and serve with it.

# `base` is enough: torch's wheels bring CUDA's libraries with them.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# A compiler and Python's headers: Triton and torch.compile build small C files when they first run.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev

COPY --from=ghcr.io/astral-sh/uv:0.9.18 /uv /usr/local/bin/uv
ENV VIRTUAL_ENV=/opt/internvl \
    PATH=/opt/internvl/bin:$PATH \
    UV_LINK_MODE=copy

# Requirements alone, so that a change of the code installs none of them again.
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# Empty for PyPI's torch; https://download.pytorch.org/whl/cpu for a tenth of the size.
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --python /usr/bin/python3 "$VIRTUAL_ENV" \
    && if [ -n "$TORCH_INDEX" ]; then \
         uv pip install --constraint constraints.txt --index-url "$TORCH_INDEX" --no-deps torch; \
       fi \
    && uv pip install --constraint constraints.txt --requirement pyproject.toml \
         --extra eval --extra fast --extra parquet --extra quant --extra search --extra serve \
         --extra video
COPY README.md LICENSE ./
COPY internvl internvl
RUN --mount=type=cache,target=/root/.cache/uv uv pip install --no-deps . && internvl --version

# Ubuntu's own first user has the number that most hosts give to theirs.
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --create-home internvl \
    # Anybody may write to the caches: `docker run --user` names other users.
    && install -d -m 1777 /cache \
    && install -d -o internvl -g internvl /work
ENV XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor
# By number, which a host that has no such name resolves too.
USER 1000:1000
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["internvl"]
CMD ["--help"]
