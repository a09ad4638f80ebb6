#!/usr/bin/python
# Copyright: the authors of iptables_balance
# MIT OR Apache-2.0

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: run_program
short_description: Runs the program that the module balancer keeps on the host
version_added: '0.2.0'
author: The authors of iptables_balance (@iptables_balance)
description:
  - Used by M(iptables_balance.gateway.balancer) for tasks with C(async). Use that module instead.
options:
  program:
    description:
      - The path of the program. Its name ends with its SHA-256, which is compared before it is run.
    type: str
    required: true
  request:
    description:
      - The arguments of the task, as JSON.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: The request says if it is check mode.
  diff_mode:
    support: full
    description: The request says if a diff is asked for.
"""

EXAMPLES = r"""
- name: Balance port 5308, in the background
  iptables_balance.gateway.balancer:
    name: CFENGINE
    destination_port: 5308
    backends: [10.9.0.1:5308, 10.9.0.2:5308]
  async: 60
  poll: 5
"""

RETURN = r"""
msg:
  description: The outcome in one sentence. All other keys are those of M(iptables_balance.gateway.balancer).
  returned: always
  type: str
"""

import hashlib
import json
import os

from ansible.module_utils.basic import AnsibleModule


def main():
    """Checks the program and runs it with the request on standard input."""
    module = AnsibleModule(
        argument_spec=dict(program=dict(type="str", required=True), request=dict(type="str", required=True)),
        supports_check_mode=True,
    )
    program = module.params["program"]
    expected = os.path.basename(program).rsplit("-", 1)[-1]
    try:
        with open(program, "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
    except (IOError, OSError) as error:
        module.fail_json(msg="cannot read the program: %s" % error)
    if found != expected:
        module.fail_json(msg="`%s` is not the program that its name says; remove it" % program)
    rc, out, err = module.run_command([program, "-"], data=module.params["request"], binary_data=True, expand_user_and_vars=False)
    try:
        result = json.loads(out)
    except ValueError as error:
        module.fail_json(msg="the program gave no result: %s" % error, rc=rc, stdout=out, stderr=err)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
