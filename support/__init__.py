"""What any training program needs: checked files, chat templates, ranks, resuming, reporting."""
