"""Makes grids of runs and one page of tables from them: `fedlora study`."""
