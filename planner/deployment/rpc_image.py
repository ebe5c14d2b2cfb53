"""A Dockerfile for llama.cpp over several boxes: its own server image, with the RPC backend that the image lacks.

The published images load their backends at run time (GGML_BACKEND_DL) and are built without GGML_RPC (llama.cpp b11434,
`.devops/*.Dockerfile`). So the backend and its server are built from the source of that version, which takes a minute,
and laid beside the others, where `ggml_backend_load_all` finds them.
"""

from .launch import Launch
from .service import Service, services

FOLDER = "/app"  # where the images keep programs and backends


def image_name(service: Service) -> str:
    """What the built image is called on the machine that built it."""
    return f"qwenfit-llama.cpp-rpc:{service.image.rpartition(':')[2]}"


def dockerfile(launch: Launch, service: Service) -> str:
    told = services()["engines"]["llama.cpp"]["rpc"]
    flags = "-DGGML_BACKEND_DL=ON -DGGML_RPC=ON -DGGML_CPU=OFF -DGGML_NATIVE=OFF"
    return "\n".join(
        [
            f"FROM {told['base']} AS build",
            "RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates cmake g++ git make",
            f"RUN git clone --depth 1 --branch {launch.plan.engine_version} {told['repository']} /source",
            f"RUN cmake -S /source -B /build -DCMAKE_BUILD_TYPE=Release {flags} \\",
            "      -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \\",
            "      -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$ORIGIN' \\",
            "    && cmake --build /build --target ggml-rpc ggml-rpc-server --parallel",
            "",
            f"FROM {service.image}",
            f"COPY --from=build /build/bin/libggml-rpc.so /build/bin/ggml-rpc-server {FOLDER}/",
            "",
        ]
    )
