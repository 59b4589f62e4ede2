# Three images: `slim` for Airflow's own components, MLflow and init, `worker` (slim's packages and torch) for what runs stages, and
# `object-store`. `make images` builds them; the commit that it hands over is what lineage names where there is no .git.

FROM python:3.11.13-slim-bookworm AS packages
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv==0.13.8 \
    && useradd --uid 10001 --create-home retune \
    && mkdir -p /opt/retune/.retune /home/retune/airflow \
    && chown retune:retune /opt/retune/.retune /home/retune/airflow
WORKDIR /opt/retune
COPY requirements.lock requirements-production.lock ./
RUN uv pip install --system --no-cache --compile-bytecode --no-deps --require-hashes \
    -r requirements.lock -r requirements-production.lock
ENV AIRFLOW_HOME=/home/retune/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/opt/retune/dags \
    AIRFLOW__CORE__PLUGINS_FOLDER=/opt/retune/plugins \
    RETUNE_PROJECT=/opt/retune \
    RETUNE_HOME=/opt/retune/.retune \
    HF_HOME=/opt/retune/.retune/huggingface \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false \
    SCARF_ANALYTICS=false

# The index decides between the CUDA and the CPU build, as for pip on any machine; the lock does not name torch.
FROM packages AS packages-with-torch
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM packages AS slim
COPY .dvcignore LICENSE README.md data.dvc dvc.lock dvc.yaml params.yaml pyproject.toml ./
COPY deploy ./deploy
COPY examples/base_model ./examples/base_model
COPY plugins ./plugins
COPY prompts ./prompts
COPY dags ./dags
COPY src ./src
# Compiled here: the user who runs it may not write beside it.
RUN uv pip install --system --no-cache --no-deps --editable . && python -m compileall -q dags plugins src
ARG RETUNE_CODE_COMMIT
RUN test "${#RETUNE_CODE_COMMIT}" -eq 40 || { echo "RETUNE_CODE_COMMIT must be the commit of this code: build with 'make images'"; exit 1; }
ENV RETUNE_CODE_COMMIT=$RETUNE_CODE_COMMIT
USER retune

FROM packages-with-torch AS worker
COPY .dvcignore LICENSE README.md data.dvc dvc.lock dvc.yaml params.yaml pyproject.toml ./
COPY deploy ./deploy
COPY examples/base_model ./examples/base_model
COPY plugins ./plugins
COPY prompts ./prompts
COPY dags ./dags
COPY src ./src
# Compiled here: the user who runs it may not write beside it.
RUN uv pip install --system --no-cache --no-deps --editable . && python -m compileall -q dags plugins src
ARG RETUNE_CODE_COMMIT
RUN test "${#RETUNE_CODE_COMMIT}" -eq 40 || { echo "RETUNE_CODE_COMMIT must be the commit of this code: build with 'make images'"; exit 1; }
ENV RETUNE_CODE_COMMIT=$RETUNE_CODE_COMMIT
USER retune

# Its conditional creates are atomic since v1.8.0; earlier ones looked first and wrote later, which init refuses.
FROM versity/versitygw:v1.8.0 AS object-store
RUN mkdir /data && chown 10001:10001 /data
USER 10001:10001
