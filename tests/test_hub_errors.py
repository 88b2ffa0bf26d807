"""What the Hub and its client say when they fail, and how it is told: never with a token."""

from __future__ import annotations

import re

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import DisabledRepoError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from lorasb_export.errors import LoraSBError, ServerError
from lorasb_export.hub.calls import hub_errors, retry_after, with_retries


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Network error: HTTP status client error (401 Unauthorized), domain: http://x", "asks for a valid token"),
        ("Rate limited: HTTP status client error (429 Too Many Requests), domain: http://x", "rate limit is reached"),
        ("Server error: HTTP status server error (503 Service Unavailable), domain: http://x", "the Hub fails (503)"),
        ("Network error: Request middleware error: error sending request for url (http://x)", "cannot be reached"),
    ],
)
def test_what_hf_xet_says_is_understood(said: str, expected: str) -> None:
    """It raises Python's own ConnectionError, with the status in words."""
    with pytest.raises(LoraSBError, match=re.escape(expected)), hub_errors("me/a", LoraSBError):
        raise ConnectionError(said)


def test_a_name_that_the_hub_does_not_know_is_not_taken_for_a_bad_token() -> None:
    """To those who are not logged in it answers 401: the repository might be a private one."""
    answer = httpx2.Response(401, request=httpx2.Request("GET", "http://hub"))
    with pytest.raises(LoraSBError, match=r"no such repository .* Check the name"), hub_errors("a/b", LoraSBError):
        raise RepositoryNotFoundError("not found", response=answer)


def test_a_name_that_no_repository_can_have_is_told_as_one() -> None:
    expected = "no such name: Cannot have -- or .. in repo_id: 'me/llama--3' (me/llama--3). Check the name"
    with pytest.raises(LoraSBError, match=re.escape(expected)), hub_errors("me/llama--3", LoraSBError):
        HfApi().model_info("me/llama--3")


def test_a_push_through_a_proxy_that_the_client_refuses_is_tried_for_no_other_repository() -> None:
    with pytest.raises(ServerError, match="HF_ENDPOINT cannot be used") as caught, hub_errors("me/a", ServerError):
        raise httpx2.InvalidURL("Invalid port: 'port'")
    assert (caught.value.silent, caught.value.of_every_repository) == (True, True)


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (429, {"Retry-After": "300"}, 300.0),
        (429, {"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 55.0),
        (429, {"ratelimit": '"api";r=0;t=301'}, None),
        (429, {}, 0.0),
        (408, {}, 0.0),
        (404, {"Retry-After": "7"}, None),
        (500, {"ratelimit": '"api";r=400;t=55'}, 0.0),
    ],
)
def test_a_rate_limit_is_waited_for_as_long_as_it_says(
    status: int, headers: dict[str, str], seconds: float | None
) -> None:
    answer = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://hub"))
    assert retry_after(HfHubHTTPError("refused", response=answer)) == seconds


def test_a_new_try_waits_as_long_as_the_hub_says_or_else_ever_longer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    answers = iter([(503, {}), (429, {"Retry-After": "7"}), (503, {}), (200, {})])

    def call() -> str:
        status, headers = next(answers)
        answer = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://hub"))
        if status != 200:
            raise HfHubHTTPError("refused", response=answer)
        return "done"

    assert (with_retries(call), waited) == ("done", [1, 7, 4])
    assert caplog.messages == ["the Hub is failing or asks to wait: the next try is in 7 s"]  # of a long wait alone


def test_a_panic_of_hf_xet_is_our_error() -> None:
    """It is no Exception. Its words are those of a push whose disk is full as it is first used."""
    panic = type("PanicException", (BaseException,), {})
    said = 'initializing rolling file appender failed: Os { code: 28, message: "No space left on device" }'
    expected = "hf_xet cannot work: No space left on device (me/a)"
    with pytest.raises(LoraSBError, match=re.escape(expected)), hub_errors("me/a", LoraSBError):
        raise panic(said)


@pytest.mark.parametrize(
    ("error", "of_every_repository"),
    [
        ((401, HfHubHTTPError), True),
        ((402, HfHubHTTPError), True),
        ((403, HfHubHTTPError), True),
        ((429, HfHubHTTPError), True),
        ((503, HfHubHTTPError), True),
        ((401, RepositoryNotFoundError), False),
        ((403, GatedRepoError), False),
        ((403, DisabledRepoError), False),
        ((400, HfHubHTTPError), False),
        ((412, HfHubHTTPError), False),
    ],
)
def test_an_error_says_whether_other_repositories_would_meet_it(
    error: tuple[int, type[HfHubHTTPError]], of_every_repository: bool
) -> None:
    status, kind = error
    answer = httpx2.Response(status, request=httpx2.Request("GET", "http://hub"))
    with pytest.raises(ServerError) as caught, hub_errors("me/a", ServerError):
        raise kind("refused", response=answer)
    assert caught.value.of_every_repository is of_every_repository
    with pytest.raises(ServerError) as caught, hub_errors("me/a", ServerError):
        raise ConnectionError("no route")
    assert caught.value.of_every_repository


def test_a_token_of_another_form_is_none_to_be_shown() -> None:
    with pytest.raises(LoraSBError) as caught, hub_errors("me/a", LoraSBError):
        raise RuntimeError("refused: Authorization: Bearer eyJhbGci.abc-123")
    assert "refused: Authorization: ***" in str(caught.value)
    assert "eyJ" not in str(caught.value)


def test_no_token_in_an_error() -> None:
    with pytest.raises(LoraSBError) as caught, hub_errors("me/a", LoraSBError):
        raise RuntimeError("header 'Bearer hf_abcDEF123' is illegal, hf_abcDEF123 too")
    assert "hf_abc" not in str(caught.value)
    assert caught.value.__suppress_context__
