"""The API against its own OpenAPI document, fuzzed by schemathesis: no 500, every answer as documented, no path told.

pip install schemathesis, then `pytest -m web`
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(find_spec("schemathesis") is None, reason="not installed: schemathesis"),
    pytest.mark.skipif(find_spec("fastapi") is None, reason="not installed: fastapi (qwenfit[serve])"),
]
HERE = (str(Path.home()) + "/", str(Path(__file__).parent.parent), "site-packages", "Traceback", ".py")
EXAMPLES = 150

if find_spec("schemathesis") and find_spec("fastapi") and find_spec("limits"):
    import schemathesis
    from hypothesis import HealthCheck, settings
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    from qwenfit.cli.page import app

    application: Any = app(hosts=["testserver", "localhost", "127.0.0.1"], rate="100000/second")
    schema = schemathesis.openapi.from_asgi("/openapi.json", application)

    @schema.parametrize()
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def test_every_answer_is_as_documented(case: Any) -> None:
        answered = case.call()
        case.validate_response(
            answered,
            checks=[
                schemathesis.checks.not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )
        told = answered.text if len(answered.content) < 100_000 else ""
        assert not [word for word in HERE if word in told]
        if answered.status_code != 200:
            assert list(answered.json()) == ["error"]
