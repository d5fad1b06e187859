// Run by test_dial.py under node: opens a packed dial and answers the cases of a JSON file.
"use strict";
const fs = require("fs");
const vm = require("vm");
const [folder, casesFile] = process.argv.slice(2);
for (const name of ["engine.js", "data.js", casesFile]) {
  const path = name === casesFile ? name : `${folder}/${name}`;
  vm.runInThisContext(fs.readFileSync(path, "utf8"), { filename: path });
}
Dial.open(DIAL_DATA).then((dial) => process.stdout.write(JSON.stringify(DIAL_CASES(dial))));
