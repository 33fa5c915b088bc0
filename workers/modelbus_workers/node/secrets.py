"""An engine's parameters as the worker needs them: unsealed, references resolved."""

from __future__ import annotations

from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import Deployment
from modelbus_broker.sealing import is_reference, resolve, unseal

from modelbus_workers.engines.base import engine_class


def engine_params(deployment: Deployment, seal_key: str) -> tuple[dict[str, str], list[str]]:
    """(parameters, names of those that must never be shown).

    Raises:
        ConfigurationError: one cannot be unsealed or resolved here; names the parameter, never its value.
        MissingExtra: the engine cannot be imported here.
    """
    secret = set(deployment.sealed)
    params = dict(deployment.engine_params)
    known = engine_class(deployment.engine).secrets
    for name in [*deployment.engine_params, *deployment.sealed]:
        try:
            if name in deployment.sealed:
                params[name] = unseal(seal_key, deployment.sealed[name])
            value = params[name]
            if is_reference(value):
                params[name] = resolve(value)
                secret.add(name)
        except ConfigurationError as error:
            raise ConfigurationError(f"parameter {name}: {error}", param=name) from None
        if name in known:
            secret.add(name)
    return params, sorted(secret)
