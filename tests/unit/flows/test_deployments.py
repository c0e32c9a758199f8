"""What `campaign schedule` says of the server it uses."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from flows import deployments
from flows.prefect_server import without_password
from flows.progress import Silent
from flows.settings import CampaignSettings, RoundSettings, Settings


@pytest.mark.parametrize("secret", ["someone:hunter2@", "someone:hun/ter2@", "someone:h@nter2@"])
def test_a_password_in_the_address_of_a_server_is_never_said(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    said: list[str] = []

    class Hears(Silent):
        def say(self, line: str) -> None:
            said.append(line)

    @contextlib.contextmanager
    def server(*, scheduling: bool) -> Iterator[str]:
        assert scheduling
        yield f"https://{secret}prefect.example/api"

    def serve(**options: Any) -> None:
        assert options["name"] == "nightly"

    class Named:
        def value(self) -> str:
            return "https://prefect.example/api"

    monkeypatch.setattr(deployments, "use_server", server)
    monkeypatch.setattr(deployments, "PREFECT_API_URL", Named())
    monkeypatch.setattr(deployments, "campaign_flow", type("Flow", (), {"serve": staticmethod(serve)}))
    deployments.serve_campaign(
        Settings(), RoundSettings(), CampaignSettings(), cron="0 3 * * *", name="nightly", listener=Hears()
    )
    (line,) = said
    assert "Prefect server: https://...@prefect.example/api" in line
    assert "ter2" not in line
    told = without_password(f"Client error for url 'https://{secret}prefect.example/api/health' (a@b)")
    assert told == "Client error for url 'https://...@prefect.example/api/health' (a@b)"
