"""The JSON API: `plan()`'s answers to the byte, the catalogs, and one sentence for whatever has no answer."""

from typing import Any

import pytest

from qwenfit.planner import Options, Request, plan
from qwenfit.planner.offers import offers
from qwenfit.planner.request import Prices

QUESTIONS: list[tuple[dict[str, Any], Request]] = [
    ({}, Request(devices=("rtx3060",))),
    ({"devices": [{"name": "RTX 3060"}], "ctx_tokens": 262144}, Request(devices=("rtx3060",), ctx_tokens=262144)),
    (
        {"model": "27b", "devices": [{"name": "rtx3090", "count": 2}, {"name": "rtx3060"}], "seqs": 4, "mtp": 2},
        Request(model="27b", devices=("rtx3090", "rtx3090", "rtx3060"), seqs=4, mtp=2),
    ),
    (
        {"model": "35b-a3b", "engine": "llama.cpp", "options": {"host_memory_bytes": 1 << 36, "ubatch_tokens": 256}},
        Request(
            model="35b-a3b",
            devices=("rtx3060",),
            engine="llama.cpp",
            options=Options(host_memory_bytes=1 << 36, ubatch_tokens=256),
        ),
    ),
    (
        {"devices": [{"name": "m1-16gb"}], "vision": True, "prices": {"device_usd": 700, "usd_per_kwh": 0.3}},
        Request(devices=("m1-16gb",), vision=True, prices=Prices(device_usd=700.0, usd_per_kwh=0.3)),
    ),
    (
        {"model": "397b", "devices": [{"name": "a100-80gb", "count": 8}], "nodes": 2, "interconnect": "8xib-hdr"},
        Request(model="397b", devices=("a100-80gb",) * 8, nodes=2, interconnect="8xib-hdr"),
    ),
    ({"ctx_tokens": 10_000_000, "seqs": 1_000_000}, Request(devices=("rtx3060",), ctx_tokens=10_000_000, seqs=10**6)),
]


@pytest.mark.parametrize(("body", "request_"), QUESTIONS)
def test_the_answer_is_the_planners(page: Any, body: dict[str, Any], request_: Request) -> None:
    answered = page().post("/api/plan", json=body)
    assert answered.status_code == 200
    assert answered.json() == plan(request_).to_json()


def test_offers_are_the_planners(page: Any) -> None:
    body = {"model": "27b", "devices": [{"name": "rtx3090", "count": 2}], "ctx_tokens": 65536}
    answered = page().post("/api/offers", json=body).json()
    assert answered["complete"] is True
    told = answered["offers"]
    found = offers(Request(model="27b", devices=("rtx3090",) * 2, ctx_tokens=65536), 2, wanted=6).found
    assert [(one["device"], one["count"], one["usd"]) for one in told] == [
        (one.price.device.name, one.count, one.usd) for one in found
    ]
    assert told[0]["plan"] == found[0].plan.to_json() and told[0]["price"]["source"].startswith("https://")


def test_catalogs(page: Any) -> None:
    client = page()
    assert "qwen3.5-9b" in [one["name"] for one in client.get("/api/models").json()["models"]]
    devices = client.get("/api/devices").json()["devices"]
    assert len(devices) > 300 and all(one["path"] is None for one in devices)
    names = client.get("/api/names").json()
    assert {"vllm", "llama.cpp"} <= {one["name"] for one in names["engines"]}
    assert set(names) == {"engines", "weights", "kv_dtypes", "state_dtypes", "interconnects"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"model": "9c"}, "no model of the catalog is called '9c'"),
        ({"model": "/etc/hostname"}, "no model of the catalog"),
        ({"devices": [{"name": "rtx3061"}]}, "rtx3060"),
        ({"devices": []}, "devices: "),
        ({"devices": [{"name": "auto"}]}, "does not tell what it runs on"),
        ({"devices": [{"name": "rtx3060", "count": 1e400}]}, ""),
        ({"devices": [{"name": "rtx3060\n"}]}, "devices.0.name: "),
        ({"engine": "vlm"}, "vllm"),
        ({"weights": "../../weights"}, "weights"),
        ({"weights": "int3"}, "int3"),
        ({"kv_dtype": "<script>"}, ""),
        ({"ctx_tokens": 0}, "ctx_tokens: "),
        ({"ctx_tokens": "256K"}, "ctx_tokens: "),
        ({"ctx_tokens": 10**400}, ""),
        ({"seqs": True}, "seqs: "),
        ({"more": 1}, "more: "),
        ({"tp": 2}, "2 devices"),
        ({"nodes": 129}, "nodes: "),
        ({"nodes": 2, "interconnect": "ib-xyz"}, "no interconnect 'ib-xyz'"),
        ({"interconnect": "ib-ndr"}, "give --nodes too"),
        ({"nodes": 2, "dp": 1025}, "dp: "),
        ({"options": {"gpu_memory_utilization": 2}}, "options.gpu_memory_utilization: "),
        ([], ""),
        ("x", ""),
        (None, ""),
    ],
)
def test_what_has_no_answer_gets_a_sentence(page: Any, body: object, says: str) -> None:
    from json import dumps

    text = dumps(body).replace("Infinity", "1e400")
    answered = page().post("/api/plan", content=text, headers={"Content-Type": "application/json"})
    assert answered.status_code == 422, answered.text
    told = answered.json()
    assert list(told) == ["error"] and says in told["error"] and told["error"].isprintable()


def test_unreadable_bodies(page: Any) -> None:
    client = page()
    for content in (b"", b"{", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 60_000):
        answered = client.post("/api/plan", content=content, headers={"Content-Type": "application/json"})
        assert answered.status_code in (400, 422) and list(answered.json()) == ["error"], content[:20]


def test_nothing_tells_where_the_server_lies(page: Any) -> None:
    """Neither the answers nor the refusals name a folder of this machine, nor of this package."""
    from pathlib import Path

    client = page()
    here = {str(Path.cwd()), str(Path.home()), str(Path(__file__).parent.parent), "site-packages", "Traceback"}
    bodies = [{"model": "."}, {"model": "~"}, {"devices": [{"name": "./x.yaml"}]}, {"weights": "checkpoint"}, {}]
    told = [client.post("/api/plan", json=body).text for body in bodies]
    told += [client.get(path).text for path in ("/api/models", "/api/devices", "/openapi.json", "/", "/static/../x")]
    assert not [word for text in told for word in here if word in text and word != "/"]


def test_the_document(page: Any) -> None:
    document = page().get("/openapi.json").json()
    assert set(document["paths"]) == {"/api/plan", "/api/offers", "/api/models", "/api/devices", "/api/names"}
    assert document["components"]["schemas"]["Question"]["properties"]["seqs"]["maximum"] == 1_000_000
    for path in document["paths"].values():
        for method in path.values():
            for status in ("400", "413", "422", "429", "503"):
                schema = method["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}
