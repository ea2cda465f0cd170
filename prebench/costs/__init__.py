"""What training a preset costs, before anything is fetched: `prebench plan --preset`."""
