"""The Grafana dashboards as code, one module each; `scripts/gen-dashboards` writes them. Nothing here is installed."""
