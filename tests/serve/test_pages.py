"""The pages: what the server sends of them, and in headless Chromium what a person can do on them."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, DRIVER, Browser
from service import Running, config_for, save_models

from fastalign.serve.api import PAGES

FILES = {path.name: path.read_text(encoding="utf-8") for path in PAGES.iterdir()}
IN_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed: the pages' scripts are unproven"),
]
NASTY = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def test_the_pages_come_with_a_policy_and_nothing_foreign(models: Path, tmp_path: Path):
    with Running(config_for(models, tmp_path)) as running, httpx.Client(base_url=running.url) as http:
        for path, kind in {"/": "html", "/operator": "html", "/pages/style.css": "css", "/pages/chat.js": "javascript"}.items():
            reply = http.get(path)
            assert reply.status_code == 200 and reply.headers["content-type"] == f"text/{kind}; charset=utf-8"
            policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
            assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["frame-ancestors"] == "'none'" and reply.headers["x-frame-options"] == "DENY"
            for link in re.findall(r'(?:src|href|from|fetch)[=(\s]*"([^"]+)"', reply.text):
                assert link.startswith("/") or link == "data:,"
                assert link == "data:," or http.get(link).status_code == 200
        assert http.post("/").status_code == 405 and http.get("/pages/chat.html").status_code == 404


def test_scripts_set_text_never_markup():
    assert set(FILES) == {"chat.html", "operator.html", "style.css", "service.js", "chat.js", "operator.js"}
    for name, text in FILES.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|javascript:", text), name
        assert not re.search(r"\son\w+=|<style|style=", text), name  # inline scripts and styles are what the policy forbids
        assert not re.findall(r"https?://(?!www\.w3\.org)", text), name
        if name.endswith(".html"):
            assert '<meta name="viewport" content="width=device-width' in text and '<html lang="en">' in text


class TestInChromium:
    pytestmark = IN_A_BROWSER

    @pytest.fixture(scope="class")
    def running(self, models: Path, tmp_path_factory):
        with Running(config_for(models, tmp_path_factory.mktemp("data"))) as running:
            yield running

    @pytest.fixture
    def token(self, running: Running) -> str:
        return running.store.add_token("operator")[1]

    def test_chat_by_keyboard_alone_on_a_phone(self, running: Running, token: str):
        with Browser(width=390, height=844, mobile=True) as page:
            page.open(running.url)
            page.wait("!document.getElementById('login').hidden")
            page.type("#token", "wrong" + "\ue007")
            page.wait("document.getElementById('login-error').textContent.includes('no valid token')")
            page.run("document.getElementById('token').value = ''")
            page.type("#token", token + "\ue007")
            page.wait("document.getElementById('name').textContent === 'tiny'")
            page.wait("document.activeElement.id === 'message'")
            page.type("#message", NASTY + "\ue007")
            page.wait("document.querySelector('.answer .actions')")
            [answer] = running.store.answers()
            assert page.run("return document.querySelector('.user .text').textContent") == NASTY == answer.messages[0]["content"]
            assert page.run("return document.querySelector('.answer .text').textContent") == answer.text
            assert page.run("return document.title") == "tiny · fastalign" and not page.run("return document.images.length")
            assert page.run("return document.documentElement.scrollWidth <= innerWidth")
            page.click(".actions button:nth-of-type(2)")
            page.wait("document.querySelector('.said').textContent")
            page.type(".reason input", "too odd" + "\ue007")
            page.wait("document.querySelector('.reason').hidden")
            [feedback] = running.store.feedback()
            assert (feedback.kind, feedback.value, feedback.reason) == ("thumb", False, "too odd") and len(
                running.store.history(answer.id)
            ) == 2
            page.click(".actions button:nth-of-type(3)")
            page.run("document.querySelector('.answer textarea').value = ''")
            page.type(".answer textarea", NASTY)
            page.click(".answer .primary")
            page.wait("document.querySelector('.answer .text')?.textContent === arguments[0]", NASTY)
            assert [f.value for f in running.store.feedback(kind="edit")] == [NASTY]
            page.type("#message", "and then?" + "\ue007")
            page.wait("document.querySelectorAll('.answer .actions').length === 2")
            last = list(running.store.answers())[-1]
            assert [m["content"] for m in last.messages] == [NASTY, NASTY, "and then?"]  # the edited answer is what was said
            assert all("401" in line for line in page.complaints())  # the wrong token, and nothing else

    def test_two_answers_are_voted_on_by_a_key(self, running: Running, token: str):
        with Browser() as page:
            page.open(running.url)
            page.run("sessionStorage.setItem('fastalign-token', arguments[0])", token)
            page.open(running.url)
            page.wait("document.getElementById('version').textContent === 'base'")
            for key, chosen in (("2", 1), ("1", 0)):
                page.click("#fresh")
                if not page.run("return document.getElementById('compare').checked"):
                    page.click("#compare")
                page.type("#message", "hello" + "\ue007")
                page.wait("document.querySelector('.votes button')")
                assert page.run("return document.getElementById('message').disabled")
                page.press(key)
                page.wait("document.querySelector('.chosen')")
                boxes = page.run("return [...document.querySelectorAll('.pair .answer')].map((box) => box.className)")
                assert ["chosen" in box for box in boxes] == [i == chosen for i in range(2)]
                feedback = list(running.store.feedback(kind="choice"))[-1]
                answer = running.store.answer(feedback.answer)
                assert answer.sampling["index"] == chosen and feedback.value == (f"{answer.response}-{1 - chosen}",)
            page.wait("document.activeElement.id === 'message'")
            assert not page.complaints()

    def test_a_long_answer_can_be_stopped_and_asked_again(self, running: Running, token: str):
        kept, running.engine.models.eos = running.engine.models.eos, frozenset([319])
        try:
            with Browser() as page:
                page.open(running.url)
                page.run("sessionStorage.setItem('fastalign-token', arguments[0])", token)
                page.open(running.url)
                page.wait("document.getElementById('version').textContent")
                longer = """'"n":1,"max_tokens":480,"temperature":2'"""
                page.run(f"const plain = fetch; window.fetch = (u, o) => plain(u, {{ ...o, body: o.body?.replace('\"n\":1', {longer}) }})")
                page.type("#message", "go on" + "\ue007")
                page.wait("document.querySelector('.answer .text').textContent.length > 3")
                page.press("escape")
                page.wait("document.getElementById('message').value === 'go on' && !document.querySelector('.answer')")
        finally:
            running.engine.models.eos = kept

    def test_the_operator_promotes_and_rolls_back(self, running: Running, token: str, models: Path):
        for i, name in enumerate(("one", "two")):
            running.store.add_version(name, models / name, parent="base", metrics={"win_rate": 0.55 + i / 10})
        running.store.add_version("gone", models / "nowhere", parent="one")
        with Browser(width=390, height=844, mobile=True) as page:
            page.open(f"{running.url}/operator")
            page.type("#token", token + "\ue007")
            page.wait("document.querySelectorAll('#versions tr').length === 4")
            assert page.run("return document.querySelectorAll('#curve circle').length") == 2
            assert page.run("return document.querySelectorAll('#days rect').length") == 4 * len(
                {c.day for c in running.store.feedback_counts()}
            )
            for name, told in (("one", "Version one answers now."), ("two", "Version two answers now.")):
                page.click(f"[aria-label='Promote {name}']")
                page.accept()
                page.wait("document.getElementById('said').textContent === arguments[0]", told)
            page.click("[aria-label='Promote gone']")
            page.accept()
            page.wait("document.getElementById('error').textContent.includes('the folder is gone')")
            assert running.engine.models.current.version == "two" == running.store.live_version().name
            page.click("#back")
            page.accept()
            page.wait("document.querySelector('.state.live').closest('tr').innerText.startsWith('one')")
            assert running.engine.models.current.version == "one" == running.store.live_version().name
            assert page.run("return document.documentElement.scrollWidth <= innerWidth")
            assert all("409" in line for line in page.complaints())  # the refused promotion, and nothing else
            page.click("#leave")
            page.wait("!document.getElementById('login').hidden")
