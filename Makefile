# make help shows what there is. Each target is one command that can also be run by hand.

TARGET := $(or $(CARGO_TARGET_DIR),target)
# What make bench measures against: lab (the miniature control plane here) or rig (a real istiod; see CONTRIBUTING.md).
CONTROL ?= lab

.PHONY: help demo test lint fuzz soak bench packages packages-twice test-packages

help: ## Show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24

demo: ## See it happen: a control plane, an application and the agent, on this machine (no root, no cluster)
	cargo build --package we-agent --package we-lab
	$(TARGET)/debug/we-lab demo --agent $(TARGET)/debug/we-agent --out target/demo

test: ## Everything that CI runs
	@.ci/test

lint: ## Format and clippy only
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- --deny warnings

fuzz: ## Whatever a fuzzer thinks of, to every door of the agent, for TIME each (TIME=1h DOORS="bus admin")
	@TIME=$(TIME) DOORS="$(DOORS)" tests/fuzz/run

soak: ## What the tests do for seconds, done for long; and a month in minutes on the release build (SOAK_ROTATIONS=100000)
	cargo build --release --package we-agent
	cargo build --release --package we-lab
	cargo build --release --package we-bench
	$(TARGET)/release/we-bench soak --agent $(TARGET)/release/we-agent --lab $(TARGET)/release/we-lab
	WE_AGENT_SWITCHES=1000000 cargo test --test it readers:: -- --nocapture
	WE_AGENT_FLEET=500 cargo test --test it fleet::a_fleet -- --nocapture

# One package at a time: built together, the agent would get features that only the others want.
bench: ## Measure the release build (CONTROL=rig BENCH_BUNDLE=DIR: against an istiod of yours, see CONTRIBUTING.md)
	cargo build --release --package we-agent
	cargo build --release --package we-lab
	cargo build --release --package we-bench
	-@tests/peers/setup
	$(TARGET)/release/we-bench --control $(CONTROL) --agent $(TARGET)/release/we-agent --lab $(TARGET)/release/we-lab
	$(TARGET)/release/we-bench inbound --agent $(TARGET)/release/we-agent --lab $(TARGET)/release/we-lab

packages: ## The .deb and the .rpm, for amd64 and arm64, into target/package/out (ARCH=amd64: only that)
	@packaging/build $(ARCH)

packages-twice: ## The same with a second full build in another place, and both compared byte by byte
	@packaging/twice $(ARCH)

test-packages: ## Install them in machines with a real systemd, and see their whole life (root, Debian)
	@tests/package/run
