"""What is done with a trained adapter or with a run's log: show, export, chat, plot."""
