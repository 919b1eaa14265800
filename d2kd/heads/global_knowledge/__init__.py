"""Global Knowledge: equal responses to prototypes, and local losses weighted by reliability."""

from .boxes import pick_foreground
from .head import GlobalKnowledge
from .options import GlobalKnowledgeOptions

__all__ = ["GlobalKnowledge", "GlobalKnowledgeOptions", "pick_foreground"]
