# rlad with a virtual environment of pinned versions. Torch's wheel brings CUDA with it.
#   docker build -t rlad .
#   docker run --rm --gpus all -v "$PWD:/runs" rlad train my_run.toml
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
RUN python -m venv /opt/rlad \
 && /opt/rlad/bin/pip install --no-cache-dir -c constraints.txt ".[math,peft,datasets]"

FROM python:3.12-slim
COPY --from=build /opt/rlad /opt/rlad
ENV PATH=/opt/rlad/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 rlad && mkdir /runs && chown rlad /runs
USER 1000
WORKDIR /runs
ENTRYPOINT ["rlad"]
CMD ["train"]
