"""What operators may do over HTTP: see versions and feedback, add a version, promote one, roll back."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from fastalign.errors import DataError
from fastalign.serve.config import ServeConfig
from fastalign.serve.engine import Engine
from fastalign.serve.guard import Caller, json_response, read_body
from fastalign.serve.store import Store
from fastalign.serve.swaps import Swaps
from fastalign.serve.wire import ApiError, parse_metrics, parse_promotion, parse_rollback, parse_version


class Admin:
    """The operations over a store and an engine."""

    def __init__(self, config: ServeConfig, store: Store, engine: Engine) -> None:
        self.config, self.store, self.swaps = config, store, Swaps(store, engine)

    async def versions(self, request: Request, caller: Caller) -> Response:
        """All versions, with how many answers each gave, and the database that holds them."""
        versions, counts = await asyncio.to_thread(lambda: (self.store.versions(), self.store.answer_counts()))
        rows = [{**asdict(version), "answers": counts.get(version.name, 0)} for version in versions]
        return json_response({"object": "list", "data": rows, "database": str(Path(self.config.data).resolve())})

    async def feedback(self, request: Request, caller: Caller) -> Response:
        """Feedback that counts, per day, version and kind."""
        counts = await asyncio.to_thread(self.store.feedback_counts)
        return json_response({"object": "list", "data": [asdict(count) for count in counts]})

    async def events(self, request: Request, caller: Caller) -> Response:
        """The last hundred events."""
        events = await asyncio.to_thread(self.store.events, limit=100)
        return json_response({"object": "list", "data": [asdict(event) for event in events]})

    async def add_version(self, request: Request, caller: Caller) -> Response:
        """A new candidate, whose folder must lie under the folder of versions."""
        given = parse_version(await read_body(request, self.config.max_body))
        folder = self._inside(given["folder"])
        given = {**given, "folder": str(folder)}
        return json_response(asdict(await asyncio.to_thread(lambda: self.store.add_version(**given))), 201)

    async def set_metrics(self, request: Request, caller: Caller) -> Response:
        """Add to what is known of a version."""
        metrics = parse_metrics(await read_body(request, self.config.max_body))
        version = await asyncio.to_thread(self.store.set_metrics, request.path_params["name"], metrics)
        return json_response(asdict(version))

    async def promote(self, request: Request, caller: Caller) -> Response:
        """Answer with a version from now on; 409 with the reason where it cannot, and the one before goes on.

        "expected" of the body, which may be left out, says which version it should replace.
        """
        expected = parse_promotion(await read_body(request, self.config.max_body, optional=True))
        return json_response(asdict(await asyncio.to_thread(self.swaps.promote, request.path_params["name"], expected)))

    async def roll_back(self, request: Request, caller: Caller) -> Response:
        """Answer with the version that was live before; "to" says which one that should be."""
        to, reason = parse_rollback(await read_body(request, self.config.max_body))
        return json_response(asdict(await asyncio.to_thread(self.swaps.roll_back, to, reason)))

    def _inside(self, folder: str) -> Path:
        root = self.config.version_folder
        try:
            path = (root / folder).resolve()
            inside = root == path or root in path.parents
            model = inside and any((path / name).is_file() for name in ("adapter_config.json", "config.json"))
        except (OSError, RuntimeError) as error:  # links that lead round (RuntimeError before Python 3.13), names that are too long
            raise DataError(f"folder {folder!r:.200} cannot be looked at: {error!s:.200}") from error
        if not inside:
            raise ApiError(
                403, f"versions must lie under the folder --versions of the service, and {folder!r:.200} does not", param="folder"
            )
        if not model:
            raise DataError(f"folder {folder!r:.200} holds neither an adapter nor a model")
        return path
