"""What runs beside a server on its node: sessions, engines, devices, launch, load. Knows no Ray, no orchestrator."""
