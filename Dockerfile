# An image that builds packages, and runs them on an NVIDIA GPU of the host if it is available (`docker run --gpus all`).
#   docker build -t ryzen-compile .
#   docker run --rm -v "$PWD:/work" ryzen-compile build model.onnx --gpu sm86,sm89
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ryzen-compile
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ryzen_compile ryzen_compile
COPY passes passes
COPY plugins plugins
COPY models models
ARG EXTRAS=cpu,rtx
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"
WORKDIR /work
ENTRYPOINT ["ryzen-compile"]
