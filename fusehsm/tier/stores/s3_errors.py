"""What botocore raises, in one line that says what to do. Its own texts have whole URLs and several lines."""

import errno
from typing import Any, Final

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
)

from fusehsm.tier.stores.base import StoreError

# Answers to HEAD have no text, so the code that is told of them is the status.
GONE: Final = frozenset(("NoSuchKey", "404"))
CHANGED: Final = frozenset(("PreconditionFailed", "412"))
OUT_OF_RANGE: Final = frozenset(("InvalidRange", "416"))
_KEYS: Final = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws (AWS_PROFILE)"
_BAD_CREDENTIALS: Final = {
    "InvalidAccessKeyId": "the server does not know this access key",
    "SignatureDoesNotMatch": "the secret key is not the access key's",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is wrong",
    "InvalidTokenId": "the session token is wrong",
}
_CLOCK: Final = frozenset(("RequestTimeTooSkewed",))
_ELSEWHERE: Final = frozenset(("PermanentRedirect", "301", "AuthorizationHeaderMalformed"))


def code_of(error: ClientError) -> str:
    """The code of an answer that is an error: a word of S3's, or the status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def explained(error: Exception, path: str, what: str, bucket: str, endpoint: str) -> OSError | None:
    """The error as one of ours, None if it is of a kind that is not S3's. `what`: "cannot be read", ...; `endpoint`: the server's URL."""
    number, why = errno.EIO, ""
    match error:
        case ClientError():
            number, why = _answer(error, bucket)
        case NoCredentialsError() | PartialCredentialsError():
            number = errno.EACCES
            why = f"no credentials are set; set {_KEYS}; for a public bucket: FSSPEC_S3_ANON=true"
        case ConnectTimeoutError() | ReadTimeoutError():
            number = errno.ETIMEDOUT
            why = f"{endpoint} does not answer; see that it is up and can be reached from here"
        case EndpointConnectionError():
            number = errno.ECONNREFUSED
            why = f"{endpoint} cannot be reached; see that AWS_ENDPOINT_URL is right and the server is up"
        case BotoCoreError():
            why = " ".join(str(error).split())
    return StoreError(number, f"{what}: {why}", path) if why else None


def _answer(error: ClientError, bucket: str) -> tuple[int, str]:
    """Number, and cause with mend."""
    code = code_of(error)
    if code == "NoSuchBucket":
        return errno.ENOENT, f"there is no bucket {bucket}; see that its name and AWS_ENDPOINT_URL are right"
    if code in _BAD_CREDENTIALS:
        return errno.EACCES, f"{_BAD_CREDENTIALS[code]}; set {_KEYS}"
    if code in ("AccessDenied", "403"):
        return (
            errno.EACCES,
            f"access is denied; the credentials need s3:ListBucket and s3:GetObject for the bucket {bucket}",
        )
    if code in _CLOCK:
        return errno.EACCES, "this machine's clock differs too much from the server's; set it"
    if code in _ELSEWHERE:
        return errno.EREMOTE, f"the bucket {bucket} lies in another region; set AWS_DEFAULT_REGION to that"
    if code in GONE:
        return errno.ENOENT, "it is not there"
    details: Any = error.response.get("Error", {})
    text = " ".join(str(details.get("Message", "")).split())
    return errno.EIO, f"the server answered {code} {text}".rstrip()
