"""What Airflow's tasks do, one function each: plain JSON in, plain JSON out, no Airflow inside."""
