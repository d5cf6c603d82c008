"""The OpenAPI document of the requests API."""

from typing import Any

from relayd.rows import VERSION

DOCUMENT: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": "relayd", "version": VERSION}, "paths": {}}
