"""Episodes -> updated networks: credit, objectives, and the learner that takes the steps of the optimizers."""
