"""The API against its own OpenAPI document, fuzzed by schemathesis: no 500, every answer as documented, no path told.

pip install -e '.[serve]' schemathesis, then `pytest -m web`
"""

from pathlib import Path
from typing import Any

import pytest

schemathesis: Any = pytest.importorskip("schemathesis", reason="not installed: schemathesis")
for library in ("fastapi", "limits", "jinja2"):
    pytest.importorskip(library, reason=f"not installed: {library} (qwenfit[serve])")
openapi: Any = pytest.importorskip("schemathesis.specs.openapi.checks")

from hypothesis import settings  # noqa: E402

from qwenfit.cli.page import app  # noqa: E402

pytestmark = pytest.mark.web
HERE = (f"{Path.home()}/", str(Path(__file__).parent.parent), "site-packages", "Traceback", ".py")
EXAMPLES = 150
CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
]
application: Any = app(hosts=["testserver", "localhost", "127.0.0.1"], rate="100000/second")
schema: Any = schemathesis.openapi.from_asgi("/openapi.json", application)


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None)
def test_every_answer_is_as_documented(case: Any) -> None:
    answered = case.call()
    case.validate_response(answered, checks=CHECKS)
    told = answered.text if len(answered.content) < 100_000 else ""
    assert not [word for word in HERE if word in told]
    if answered.status_code != 200:
        assert list(answered.json()) == ["error"]
