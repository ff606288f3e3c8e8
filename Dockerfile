# qtool in a container. Not built here: this workplace has no container runtime.
#   docker build -t qtool --build-arg VARIANT=cpu .
#   docker build -t qtool:cuda --build-arg VARIANT=cuda .
#   docker run --rm -v "$PWD:/work" qtool run demo
#   docker run --rm --gpus all -v "$PWD:/work" -v hub:/home/qtool/.cache/huggingface qtool:cuda run my-recipe.yaml
# Generated programs are judged in namespaces of their own, which Docker's default seccomp profile forbids: qtool then takes
# Landlock where the kernel has it, and says which sandbox it took. --security-opt seccomp=unconfined allows namespaces.
FROM python:3.12-slim-bookworm
ARG VARIANT=cpu
ARG EXTRAS=gguf,nf4
# a compiler for Triton's kernels and for importance matrices; Node judges JavaScript; bubblewrap is a sandbox
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap gcc libc6-dev libgomp1 nodejs \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/qtool
COPY . .
RUN if [ "$VARIANT" = cpu ]; then index="--index-url https://download.pytorch.org/whl/cpu"; fi \
    && pip install --no-cache-dir --constraint constraints.txt $index torch \
    && if [ "$VARIANT" = cuda ]; then EXTRAS="$EXTRAS,cuda"; fi \
    && pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"
RUN useradd --create-home qtool && mkdir /work && chown qtool /work
USER qtool
WORKDIR /work
ENTRYPOINT ["qtool"]
CMD ["--help"]
