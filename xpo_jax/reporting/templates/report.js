for (const box of document.querySelectorAll('.browse')) {
  const body = box.querySelector('tbody'), rows = [...body.rows];
  const field = box.querySelector('input'), menu = box.querySelector('select'), counter = box.querySelector('output');
  const show = () => {
    let shown = 0;
    for (const row of rows) {
      const matches = row.textContent.toLowerCase().includes(field.value.toLowerCase());
      row.hidden = !(matches && (!menu || !menu.value || row.dataset.kind === menu.value));
      shown += !row.hidden;
    }
    counter.textContent = shown + ' of ' + rows.length;
  };
  field.addEventListener('input', show);
  if (menu) menu.addEventListener('change', show);
  box.querySelectorAll('th button').forEach((button, i) => {
    let order = -1;
    const key = row => row.cells[i].dataset.value ?? row.cells[i].textContent;
    button.addEventListener('click', () => {
      order = -order;
      rows.sort((a, b) => order * (key(a) - key(b) || (isNaN(key(a) - key(b)) && key(a).localeCompare(key(b)))));
      body.append(...rows);
    });
  });
}
