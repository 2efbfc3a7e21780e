"""The page of the server in a real browser."""

from __future__ import annotations

import asyncio
import re
import struct
from pathlib import Path

from browser import needs_chromium, opened
from served import NAME, PROMPTS, alone, client, listening, wait_for

import patchkit.serving

SEND = "document.getElementById('form').requestSubmit()"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = (Path(patchkit.serving.__file__).parent / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|src=", text)
    with client() as served:
        response = served.get("/")
        assert response.text == text and "connect-src 'self'" in response.headers["content-security-policy"]


def test_the_report_that_the_page_shows() -> None:
    with client(max_rows=3) as served:
        found = served.get("/v1/patchkit/report").json()
        assert found["model"] == NAME and found["chat"] is True and found["rows"] == {"running": 0, "waiting": 0, "max": 3}
        assert found["patches"][0]["spec"] == "speculative(k=0)" and "hits" in found["patches"][0]


@needs_chromium
def test_a_chat_in_a_browser(tmp_path: Path) -> None:
    message = PROMPTS[0].strip()

    async def look(url: str, application: object) -> None:
        async with opened(url, tmp_path / "profile") as page:
            await page.wait_for(f"document.getElementById('model').textContent === {NAME!r}")
            await page.value("document.getElementById('most').value = 12")
            await page.value(f"document.getElementById('prompt').value = {message!r}")
            await page.value(SEND)
            await page.wait_for("document.getElementById('tokens').textContent === '12'")
            shown = await page.value("[...document.querySelectorAll('.message p')].map(p => p.textContent)")
            assert shown == [message, alone(f"[user] {message}\n[assistant] ", max_new_tokens=12)]
            assert float(await page.value("document.getElementById('rate').textContent")) > 0
            assert await page.value("document.getElementById('accepted').textContent") == "no drafts"
            assert "speculative(k=0)" in await page.value("document.getElementById('patches').textContent")
            # An answer that is stopped frees its row.
            await page.value("document.getElementById('most').value = 300; document.getElementById('prompt').value = 'more'")
            await page.value(SEND)
            await page.wait_for("document.querySelectorAll('.message p')[3]?.textContent.length > 3")
            await page.value("document.getElementById('stop').click()")
            await page.wait_for("document.querySelectorAll('.message small')[3].textContent === 'stopped'")
            await page.screenshot(tmp_path / "page.png")
            # What is refused is shown.
            await page.value("document.getElementById('most').value = 100000; document.getElementById('prompt').value = 'even more'")
            await page.value(SEND)
            await page.wait_for("document.querySelector('.error p')?.textContent.includes('too many')")
            assert [error for error in page.errors if "400" not in error] == []

    with listening() as (url, application):
        asyncio.run(look(url, application))
        wait_for(lambda: application.state.engine.idle, 10)
    picture = (tmp_path / "page.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and struct.unpack(">II", picture[16:24])[0] >= 1000
