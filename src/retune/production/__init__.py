"""What the containers of docker-compose.yml run beside Airflow's and MLflow's own commands, and the secrets that they share."""
