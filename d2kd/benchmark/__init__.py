"""What distillation costs: time, memory and floating-point operations of a step."""
