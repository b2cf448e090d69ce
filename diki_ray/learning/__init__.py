"""How one task's module is learnt: methods, the trainer of a task, and what a module keeps."""
