"""What child processes must not inherit: tokens, keys and passwords in the environment, code of the current folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Names as people give them to secrets, and to addresses that have one inside.
_SECRET = re.compile(
    r"TOKEN(?!IZERS)|SECRET|CREDENTIAL|PASSW|PASSPHRASE|PASSCODE|COOKIE|WEBHOOK|BEARER|OAUTH|AUTHORIZATION|NETRC|ASKPASS"
    r"|CONNECTION_?STRING|CONN_?STR|PRIVATE|SIGNING|SIGNATURE|KUBECONFIG"
    r"|(?<!BY)PASS(_|$)|(^|_)(PW|PAT|TOK|TKN|JWT|DSN|SAS|AUTH|CREDS?|OTP|TOTP|SALT|PEM)(_|$)|(?<=.)PWD(_|$)"
    r"|(^|_|API|ACCESS|AUTH|ACCOUNT|MASTER|ENCRYPTION|ENCRYPT|SSH|GPG|PGP|LICENSE)KEYS?(_?ID|_?FILE|_?PATH)?(_|$)|APIKEY"
    r"|(^|_)(URL|URI)S?(_|$)|(DATABASE|DB|REDIS|MONGO|POSTGRES|MYSQL|AMQP|BROKER)(URL|URI)"
    r"|^(AWS|AZURE|ARM|GCP|GOOGLE|GCLOUD|CLOUDSDK|S3|R2|B2|OCI|DOCKER|VAULT|OP|WANDB|COMET|NEPTUNE|SENTRY|SLACK|SMTP"
    r"|MAIL|STRIPE|TWILIO|GITLAB|GITHUB|GH|CI_JOB|NPM|PIP|UV|TWINE|PGPASS|PGSERVICE|SSH|GPG)_"
)
# Values that are one whatever their name: a password in an address, the usual beginnings of tokens, a private key.
_VALUE = re.compile(
    r"://[^/?#\s]*@|(^|[\s=:\"'])(hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abeprs]-|npm_|pypi-|AKIA|ASIA|AIza|dckr_pat_)"
    r"[A-Za-z0-9_-]{8}|-----BEGIN|(^|\s)(Bearer|Basic) \S|eyJ[\w-]{8,}\.eyJ"
)
SHORTEST = 6  # characters: what is shorter stands in every text
_SHOWN = re.compile(f"(?:{_VALUE.pattern})[A-Za-z0-9_.~+/=-]*")  # to its end, which the beginning does not show
# What torch, CUDA, the Hub's cache, the engines and a shell need.
_NEEDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|TZ|TERM|TMPDIR|TEMP|TMP|PWD|HOSTNAME|COLUMNS|NO_COLOR|VIRTUAL_ENV|CC|CXX"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|LIBRARY_PATH|CPATH|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|(NO|HTTPS?|ALL)_PROXY"
    r"|(LC|XDG|CUDA|NVIDIA|NCCL|CUBLAS|CUDNN|NVTE|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|NUMEXPR"
    r"|DNNL|ONEDNN|ATEN|PYTHON|HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|TOKENIZERS|DATASETS|SAFETENSORS|BNB|BITSANDBYTES"
    r"|GGML|LLAMA|VLLM|SGLANG|SGL|FLASHINFER|FLASH_ATTENTION|RAY|ROCM|ROCR|HIP|HSA|MIOPEN|AMD|SYCL|ZE|NUMBA|MALLOC|GLIBC"
    r"|CONDA|QTOOL)(_.*)?|PYTHON[A-Z]+|CUDA[A-Z]+"
)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what by its name or by its value holds a token, a key, a secret or a password."""
    return {name: value for name, value in environment.items() if not _is_secret(name, value)}


def for_child(environment: Mapping[str, str]) -> dict[str, str]:
    """For a Python process that computes: only what it is known to need, and no secret among that. It imports nothing
    from the folder that it happens to be started in."""
    kept = {name: value for name, value in without_secrets(environment).items() if _NEEDED.fullmatch(name.upper())}
    if "PYTHONPATH" in kept:  # an empty part means the current folder
        kept["PYTHONPATH"] = os.pathsep.join(p for p in kept["PYTHONPATH"].split(os.pathsep) if os.path.isabs(p))
    return kept | {"PYTHONSAFEPATH": "1"}


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET.search(name.upper()) or _VALUE.search(value))


def hidden(text: str, environment: Mapping[str, str]) -> str:
    """``text``, such as a program's log, without secrets of this environment and without what looks like one."""
    for name, value in environment.items():
        if len(value) >= SHORTEST and _is_secret(name, value):
            text = text.replace(value, "***")
    return _SHOWN.sub(lambda found: ("" if found[0][0].isalnum() else found[0][0]) + "***", text)


@contextmanager
def withheld() -> Iterator[None]:
    """This process's environment without its secrets until the block ends, for libraries that start processes; Python
    among those imports nothing from the current folder."""
    before = dict(os.environ)
    secrets = before.keys() - without_secrets(before).keys()
    for name in secrets:
        del os.environ[name]
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ.update({name: before[name] for name in secrets})
        if "PYTHONSAFEPATH" not in before:
            del os.environ["PYTHONSAFEPATH"]
