"""Records to statements: join, statistics, tables, plots, comparison. Never imports torch."""
