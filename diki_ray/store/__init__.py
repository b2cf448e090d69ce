"""What outlives any process: a run's log, the library of modules, checkpoints. Nothing here imports Ray or torch."""
