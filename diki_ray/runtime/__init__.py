"""What runs on Ray: the store, the trainer, the evaluator and what people see of them."""
