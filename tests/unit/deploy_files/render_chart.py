"""Run as a program: `helm lint`, then `helm install` of a chart into a Kubernetes that only writes down what it gets.

    render_chart.py LIBRARY CHART RELEASE VALUES_JSON

Prints JSON: `lint` (what helm said) and `objects` (what it created), or `error`. LIBRARY is Helm as a shared library,
from the wheel of helm-sdkpy. A process of its own, because a Go runtime stays in the one that loads it.
"""

from __future__ import annotations

import base64
import ctypes
import http.server
import json
import pathlib
import sys
import tempfile
import threading
from typing import Any

RESOURCES = {
    "v1": ("ConfigMap", "Secret", "Service", "ServiceAccount", "Namespace"),
    "apps/v1": ("StatefulSet",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "monitoring.coreos.com/v1": ("ServiceMonitor", "PrometheusRule"),
    "cert-manager.io/v1": ("Certificate",),
}
NAMESPACE = "training"


def plural(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


class Kubernetes(http.server.BaseHTTPRequestHandler):
    """Discovery as it is; nothing exists; everything can be created, and stays in `created`."""

    created: list[dict[str, Any]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path == "version":
            self.answer({"major": "1", "minor": "33", "gitVersion": "v1.33.0"})
        elif path == "api":
            self.answer({"kind": "APIVersions", "versions": ["v1"]})
        elif path == "apis":
            named = [version for version in RESOURCES if "/" in version]
            groups = [
                {
                    "name": version.split("/")[0],
                    "versions": [{"groupVersion": version, "version": "v1"}],
                    "preferredVersion": {"groupVersion": version, "version": "v1"},
                }
                for version in named
            ]
            self.answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif (version := path.removeprefix("apis/").removeprefix("api/")) in RESOURCES:
            self.answer({"kind": "APIResourceList", "groupVersion": version, "resources": self.resources(version)})
        elif path.endswith("/secrets"):
            self.answer({"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": []})
        else:
            self.answer({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        # Helm's own record of the release comes as protobuf, what the chart describes as JSON.
        if "json" in self.headers["content-type"]:
            type(self).created.append(json.loads(body))
        self.send(body, self.headers["content-type"], 201)

    def do_PUT(self) -> None:
        self.send(self.rfile.read(int(self.headers["content-length"])), self.headers["content-type"])

    def resources(self, version: str) -> list[dict[str, Any]]:
        return [
            {
                "name": plural(kind.lower()),
                "singularName": kind.lower(),
                "namespaced": kind != "Namespace",
                "kind": kind,
                "verbs": ["create", "get", "list", "update", "patch", "delete"],
            }
            for kind in RESOURCES[version]
        ]

    def answer(self, content: dict[str, Any], code: int = 200) -> None:
        self.send(json.dumps(content).encode(), "application/json", code)

    def send(self, body: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Helm:
    """The few functions of the library that are needed."""

    def __init__(self, library: str, server: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.helm_sdkpy_last_error.restype = ctypes.c_char_p
        self._handle = ctypes.c_uint64()
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {"token": base64.b64encode(b"nothing").decode()}}],
        }
        create = self._library.helm_sdkpy_config_create
        self._directory = tempfile.TemporaryDirectory()
        path = pathlib.Path(self._directory.name, "kubeconfig")
        path.write_text(json.dumps(kubeconfig))
        if create(NAMESPACE.encode(), str(path).encode(), None, b"{}", ctypes.byref(self._handle)):
            raise RuntimeError(self.error())

    def error(self) -> str:
        return (self._library.helm_sdkpy_last_error() or b"?").decode()

    def call(self, name: str, *words: str) -> Any:
        result = ctypes.c_char_p()
        function = getattr(self._library, f"helm_sdkpy_{name}")
        if function(self._handle, *(word.encode() for word in words), ctypes.byref(result)):
            raise RuntimeError(self.error())
        return json.loads(result.value or b"null")


def main(library: str, chart: str, release: str, values: str) -> None:
    Kubernetes.created = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kubernetes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        helm = Helm(library, f"http://127.0.0.1:{server.server_port}")
        answer: dict[str, Any] = {"lint": helm.call("lint", chart)}
        options = {
            "wait": False,
            "timeout_seconds": 30,
            "server_side_apply": "false",
            "disable_openapi_validation": True,
        }
        try:
            helm.call("install", release, chart, values, "", json.dumps(options))
        except RuntimeError as error:
            answer["error"] = str(error)
        answer["objects"] = Kubernetes.created
        print(json.dumps(answer))
        server.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
