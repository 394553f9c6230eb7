"""The fp16 loss scaler of an engine, wherever DeepSpeed keeps it."""

from __future__ import annotations

from typing import Any


def scaler_of(engine: Any) -> Any:
    """torch's GradScaler (in the engine at stage 0, in its optimizer with ZeRO), or None."""
    return getattr(engine, "torch_autocast_z0_gradscaler", None) or getattr(
        getattr(engine, "optimizer", None), "torch_autocast_gradscaler", None
    )


def loss_scale(engine: Any) -> float:
    """The factor that gradients carry now; 1 without a scaler."""
    scaler = scaler_of(engine)
    return float(scaler.get_scale()) if scaler is not None else 1.0
