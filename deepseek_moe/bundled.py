"""The small trained models that come with the repository."""

from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"
BUNDLED_MODEL = MODELS / "tiny-base"
BUNDLED_CHAT_MODEL = MODELS / "tiny-chat"
