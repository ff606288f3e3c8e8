"""What the Hub's client raises, said in one line that a user can act on; and the token that no line may show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qtool import QtoolError


def token() -> str | None:
    """As huggingface_hub finds it: `HF_TOKEN`, or what `hf auth login` stored."""
    from huggingface_hub import get_token

    return get_token()


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """huggingface_hub's errors as QtoolErrors. Of the answer only the server's own message is shown: addresses carry
    signatures."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except QtoolError:
        raise
    except Exception as error:  # the client wraps what it meets in many kinds: known causes are named, others rise
        chain = list(_chain(error))
        for cause in chain:
            if isinstance(cause, HfHubHTTPError):
                raise _http_error(doing, cause.response.status_code, _words(cause.response)) from None
        if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
            raise QtoolError(f"{doing}: HF_HUB_OFFLINE is set. Unset it.", exit_code=3) from None
        # hf_xet, which moves large files, says most of what goes wrong as a bare RuntimeError
        if any(isinstance(cause, httpx2.HTTPError | OSError) or type(cause) is RuntimeError for cause in chain):
            kind = type(chain[-1]).__name__
            if kind == "gaierror":
                said = f"{doing}: the Hub cannot be reached: there is no network here, or no name service."
                raise QtoolError(said, exit_code=3) from None
            raise QtoolError(
                f"{doing}: the connection broke ({kind}). Run the same command again: it goes on, and large files that "
                "arrived are not sent again.", exit_code=3,
            ) from None  # fmt: skip
        if isinstance(error, ValueError):
            raise QtoolError(f"{doing}: {_without_token(str(error))}") from None
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(response: Any) -> str:
    said = response.headers.get("X-Error-Message") or ""
    if not said:
        try:
            said = str(response.json().get("error", ""))
        except (ValueError, AttributeError):  # no JSON, or no mapping: an answer without words
            said = ""
    return _without_token(" ".join(said.split())[:300])


def _without_token(text: str) -> str:
    secret = token()
    return text.replace(secret, "***") if secret else text


def _http_error(doing: str, status: int, words: str) -> QtoolError:
    said = f" ({words})" if words else ""
    again = "Run the same command again: it goes on, and large files that arrived are not sent again."
    if status == 401:
        return QtoolError(f"{doing}: the Hub does not accept the token{said}. Log in anew with `hf auth login`.")
    if status == 403:
        return QtoolError(f"{doing}: the token has no right to do that{said}. It needs write access there.")
    if status == 404:
        return QtoolError(f"{doing}: not on the Hub, or hidden from this token{said}.")
    if status in (409, 412):
        return QtoolError(f"{doing}: it changed meanwhile{said}. Look at it, then publish again.")
    if status == 429:
        return QtoolError(f"{doing}: the Hub asks for fewer requests{said}. Wait, then: {again}", exit_code=3)
    if status >= 500:
        return QtoolError(f"{doing}: the Hub failed with {status}{said}. {again}", exit_code=3)
    return QtoolError(f"{doing}: the Hub answered {status}{said}.")
