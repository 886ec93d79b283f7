"""How a stand-in for the Hub answers questions about users, and gives tokens to workflows."""

from __future__ import annotations

import json
import secrets
from urllib.parse import parse_qs

from hub_card import check_card
from hub_exchange import Answer, Exchange, Route
from hub_store import Access, RefusalError

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"


def whoami(exchange: Exchange) -> Answer:
    access = exchange.login()
    if access.only:
        raise RefusalError(401, "This token belongs to no user")
    role = "write" if access.is_writing else "read"
    token = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
    return Answer({"type": "user", "id": access.user, "name": access.user, "orgs": [], "auth": token})


def validate_yaml(exchange: Exchange) -> Answer:
    asked = exchange.json()
    errors, warnings = check_card(asked.get("content", ""), asked.get("repoType", "model"))
    said = {"errors": [{"message": one} for one in errors], "warnings": [{"message": one} for one in warnings]}
    return Answer(said, 400 if errors else 200)


def mint_id_token(exchange: Exchange) -> Answer:
    """What GitHub gives to a workflow that may ask for it."""
    if exchange.headers.get("Authorization") != f"Bearer {exchange.store.sign('workflow')}":
        raise RefusalError(401, "Not a workflow")
    token = f"eyJ.{secrets.token_hex(16)}.{secrets.token_hex(8)}"
    exchange.hub.id_tokens[token] = exchange.query.get("audience", "")
    return Answer({"count": len(token), "value": token})


def exchange_token(exchange: Exchange) -> Answer:
    """Give a token that may write to one repository for an id token."""
    body = exchange.body()
    is_json = exchange.headers.get("Content-Type", "").startswith("application/json")
    asked = json.loads(body) if is_json else {key: value[0] for key, value in parse_qs(body.decode()).items()}
    if asked.get("grant_type") != EXCHANGE or asked.get("subject_token_type") != ID_TOKEN:
        return Answer({"error": "invalid_request", "error_description": "Not an exchange of an id token"}, 400)
    resource = str(asked.get("resource"))
    repository = exchange.store.repositories.get(resource)
    audience = exchange.hub.id_tokens.get(asked.get("subject_token"))
    if audience != exchange.hub.endpoint or repository is None or resource not in exchange.hub.trusted:
        return Answer({"error": "invalid_grant", "error_description": "No trusted publisher matches"}, 400)
    token = exchange.store.add_token(f"workflow of {resource}", Access(repository.owner, only=resource), "hf_jwt_")
    kind = "urn:ietf:params:oauth:token-type:access_token"
    return Answer({"access_token": token, "token_type": "bearer", "expires_in": 3600, "issued_token_type": kind})


ROUTES: list[Route] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", "/github/id-token", mint_id_token),
    ("POST", "/oauth/token", exchange_token),
]
