# syntax=docker/dockerfile:1
# One image per process, each with what it runs and little else:
#   docker build --target engine -t livedraft-engine .
# Targets: engine, gateway, relay, trainer, controller, mlflow, sglang.

FROM python:3.11.13-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# The user, the folders (a named volume takes its owner from the image), the package without its extras.
FROM python:3.11.13-slim-bookworm AS runtime
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/var/lib/livedraft/models
RUN useradd --system --uid 10001 --no-create-home --home-dir /var/lib/livedraft livedraft \
    && mkdir -p /var/lib/livedraft/drafter /var/lib/livedraft/engine /var/lib/livedraft/models \
        /var/lib/livedraft/relay /var/lib/livedraft/swap /var/lib/livedraft/trainer \
    && chown -R livedraft /var/lib/livedraft
COPY --from=wheel /wheels /wheels
WORKDIR /var/lib/livedraft
ENTRYPOINT ["livedraft"]
CMD ["--help"]

# torch from an index of CPU builds; the processes that compute share this layer.
FROM runtime AS torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install torch==2.13.0 --index-url "${TORCH_INDEX}"

FROM torch AS engine
RUN pip install "$(ls /wheels/*.whl)[engine,gateway,relay,registry]"
USER 10001

FROM runtime AS gateway
RUN pip install "$(ls /wheels/*.whl)[gateway,traces]"
USER 10001

FROM runtime AS relay
RUN pip install "$(ls /wheels/*.whl)[relay,kafka]"
USER 10001

FROM torch AS trainer
RUN pip install "$(ls /wheels/*.whl)[engine,trainer,kafka,registry]"
USER 10001

# It replays drafts, so it needs what the trainer needs.
FROM trainer AS controller

FROM python:3.11.13-slim-bookworm AS mlflow
ENV PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/mlflow mlflow \
    && pip install --no-cache-dir mlflow==3.17.2
USER 10001
WORKDIR /var/lib/mlflow
ENTRYPOINT ["mlflow"]

# SGLang's own image and in it our plugin, which leaves its torch and SGLang what they are.  What it compiles and caches
# goes to HOME, a volume: our user is nobody special there either.
FROM lmsysorg/sglang:v0.5.23 AS sglang
ENV PIP_NO_CACHE_DIR=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    HF_HOME=/var/lib/livedraft/models \
    HOME=/var/lib/livedraft/sglang
RUN useradd --system --uid 10001 --no-create-home --home-dir /var/lib/livedraft/sglang livedraft \
    && mkdir -p /var/lib/livedraft/drafter /var/lib/livedraft/models /var/lib/livedraft/sglang \
        /var/lib/livedraft/swap \
    && chown -R livedraft /var/lib/livedraft
COPY --from=wheel /wheels /wheels
RUN python3 -m pip install "$(ls /wheels/*.whl)[sglang]"
USER 10001
WORKDIR /var/lib/livedraft/sglang
