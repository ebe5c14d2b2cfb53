"""Units for an engine that is installed on the machine itself (systemd.service(5), systemd.exec(5)).

ExecStart is the plan's line. systemd reads `%` and `$` in it, so those are doubled; addresses come from the environment
file. The engine runs as a user of its own that can write its state and nothing else; what it needs and many
units forbid (devices, memory that is written and then run, which compilers make) stays allowed.
"""

from .launch import Launch, placed
from .service import Service

BIN_FOLDER = "/opt/qwenfit/bin"  # a virtual environment, or where llama-server was installed to
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@+=:,./-_")


HARDENING = (
    *("NoNewPrivileges=yes", "CapabilityBoundingSet=", "UMask=0077", "PrivateTmp=yes", "RemoveIPC=yes"),
    *("ProtectSystem=strict", "ProtectHome=read-only", "ProtectProc=invisible", "ProtectClock=yes"),
    *("ProtectHostname=yes", "ProtectKernelLogs=yes", "ProtectKernelModules=yes", "ProtectKernelTunables=yes"),
    *("ProtectControlGroups=yes", "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK"),
    *("RestrictNamespaces=yes", "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes"),
    "SystemCallArchitectures=native",
)


def unit(launch: Launch, service: Service, startup_s: int, node: int, sha256: str) -> str:
    """The unit of one box. A server says nothing when it is ready, so the start counts as done once it runs."""
    environment = {"HOME": "/var/lib/qwenfit", **launch.environment}
    if node == 0:  # a bare server listens on this machine only, as it does by itself
        environment |= {name: value for name, value in service.environment.items() if name != "LLAMA_ARG_HOST"}
    path = f"{BIN_FOLDER}:/usr/local/bin:/usr/bin:/bin"
    lines = [
        "[Unit]",
        f"Description={_text(launch.plan.engine)} serves {_text(launch.name)} (qwenfit plan {sha256[:12]})",
        f"Documentation={service.documentation}",
        "After=network-online.target",
        "Wants=network-online.target",
        "StartLimitIntervalSec=1h",
        f"StartLimitBurst={120 if launch.calls_boxes else 5}",  # an hour of half minutes: the others may come later
        "",
        "[Service]",
        "Type=exec",
        "User=qwenfit",
        "Group=qwenfit",
        "SupplementaryGroups=video render",
        "StateDirectory=qwenfit",
        "WorkingDirectory=/var/lib/qwenfit",
        f"ExecSearchPath={path}",
        f"Environment=PATH={path}",
        *(f"Environment={word(f'{name}={value}', expands=False)}" for name, value in environment.items()),
        "EnvironmentFile=-/etc/qwenfit/engine.env",
        "ExecStart=" + " ".join(word(one) for one in launch.boxes[node]),
        "Restart=on-failure",
        "RestartSec=30s",
        f"TimeoutStartSec={startup_s}s",
        "TimeoutStopSec=2min",
        "KillMode=mixed",
        "LimitMEMLOCK=infinity",
        "LimitNOFILE=1048576",
        *HARDENING,
        "",
        "[Install]",
        "WantedBy=multi-user.target",
        "",
    ]
    return "\n".join(lines)


def word(text: str, expands: bool = True) -> str:
    """One word of a unit's command line, or (`expands` false) of its Environment=, where `$` means nothing."""
    text = text.replace("%", "%%")
    if expands:
        text = placed(text.replace("$", "$$"), lambda name: f"${{{name}}}")
    if text and _PLAIN.issuperset(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _text(name: str) -> str:
    """On one line, and no specifier."""
    return "".join(c for c in name if c.isprintable()).replace("%", "%%")
