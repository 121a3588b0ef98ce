"""Plans a training step on chips that need not be there: memory, time, and the best mesh."""

from sharding.plan.search import Plan, best_plans, make_plan
from sharding.plan.shapes import LayerShapes, ModelShapes, Step, deepseek_v3_shapes

__all__ = [
  "LayerShapes",
  "ModelShapes",
  "Plan",
  "Step",
  "best_plans",
  "deepseek_v3_shapes",
  "make_plan",
]
